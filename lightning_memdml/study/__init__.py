"""The commands that draw pair weights, and studies that compare arms."""
