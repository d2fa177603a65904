"""What a race measures: time, memory, the machine and its ceilings."""
