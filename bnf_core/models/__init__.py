"""What is known of a model without a framework: its folder, configuration, sizes, adapters."""
