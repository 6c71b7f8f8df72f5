"""Many runs from one search space: Ray gives each its resources, Optuna proposes and stops."""
