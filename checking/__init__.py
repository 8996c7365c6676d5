"""Checks of data sets before training: `samf data check`."""
