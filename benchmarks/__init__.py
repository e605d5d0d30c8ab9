"""Programs a person runs: training against AdamW, and the time of a step against SGD and other packages."""
