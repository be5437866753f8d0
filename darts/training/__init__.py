"""The trainers, the rounds that feed them, and the task runner that starts them."""
