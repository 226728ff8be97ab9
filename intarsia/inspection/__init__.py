"""Models without a family file: their structure according to `transformers`, and small versions for checks."""
