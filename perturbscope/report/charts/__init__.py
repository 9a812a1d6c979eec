"""Charts of the report as inline SVG, drawn without a library, with colours from the page's style sheet."""
