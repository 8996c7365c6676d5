"""Constants that modules with and without torch share."""

# Label of tokens without a loss (a prompt's) and of unknown findings.
IGNORE_INDEX = -100

REPORT_QUESTION = "Write the radiology report of this chest CT."
