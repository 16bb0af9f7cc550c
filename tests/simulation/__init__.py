"""The real code of the run's log over a simulated store, in every order of its operations."""
