"""The report of a compressed folder: one HTML file that needs nothing else, and its figures as PNG.

`data` gathers numbers from the folder, `figures` draws them as SVG, `page` puts them on a page, `plots` draws the same
numbers with matplotlib.
"""
