"""SHOWING: what was measured, as one HTML file and as a local web view."""
