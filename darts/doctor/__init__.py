"""What is there, and will it work? The first rung of the smoke ladder (docs/smoke.md): `python -m darts.doctor`."""
