"""Every layer with parameters as a grouped linear map."""
