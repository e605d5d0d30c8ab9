"""Programs with other libraries: pip install "torchcurv[integrations]"."""
