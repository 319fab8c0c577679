"""HTTP over the public door: one server for the clients of several APIs."""
