"""Looking at curvature: whole data sets, operators, spectra, directions."""
