"""The SCFeat network, one component of the paper per file."""
