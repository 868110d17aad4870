"""The report: one HTML file about a run, or about several."""
