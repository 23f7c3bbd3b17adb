"""Methods that read every key and change how much each counts. Importing the package registers them."""

from . import act as act
