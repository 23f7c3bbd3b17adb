"""What learns a method's weights from a text, apart from the methods. A method's ``calibration`` makes
one."""
