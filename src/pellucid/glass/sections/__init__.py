"""The sections of the report: a bundle in, one ``<section>`` out, empty if there is nothing to show."""
