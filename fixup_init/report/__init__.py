"""Data into text, figures and pages; nothing here measures or decides anything.

`tree` draws a structure and a plan, `text` a propagation or a comparison as tables, `figure` as a matplotlib figure and
`html` as one interactive page.
"""
