"""Training drafters: data, objectives, trainer, and the pipeline that joins them."""
