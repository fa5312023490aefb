"""Complete settings, one file for each experiment; installed as `wsi_pipeline.configs`."""
