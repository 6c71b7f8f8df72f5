"""The one entry: configuration, ranks, engine, predictions, metrics, reports."""
