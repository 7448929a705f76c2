"""What surrounds single requests to a storage; nothing here knows a scheme."""
