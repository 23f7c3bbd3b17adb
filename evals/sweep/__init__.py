"""Sweeps: many evaluations from one YAML file, by one process or several, that survive being stopped.

config.py   the YAML file
stops.py    cells that are not worth going on with
share.py    one results folder that several processes fill, cell by cell
work.py     the loop over grids and cells, and the time that is left
"""
