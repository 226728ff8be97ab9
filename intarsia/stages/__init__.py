"""What a user asks for: each stage is one function that returns a typed result."""
