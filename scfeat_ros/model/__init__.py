"""The SCFeat network, one idea of the paper per file."""
