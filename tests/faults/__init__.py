"Faults injected into runs, and what becomes of them"
