"""Figures of a report, as Plotly draws them."""
