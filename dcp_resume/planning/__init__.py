"""Who writes what, and who reads what. No I/O: integers, arrays and state dicts in, plans out."""
