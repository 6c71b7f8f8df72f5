"""What every large model must clear: linear models, small networks, and combinations of runs."""
