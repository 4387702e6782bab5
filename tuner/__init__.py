"""From a model to jobs, from jobs to measured or predicted winners in a store."""
