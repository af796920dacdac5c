"""Model room: norm branches, timm architectures, pre-training model and released encoder."""
