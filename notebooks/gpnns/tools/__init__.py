"""Installing, running, rendering, drawing: the machinery around the notebooks."""
