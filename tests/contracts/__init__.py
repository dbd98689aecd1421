"""What every part of a table promises: one suite per table, and a throw-away part that is seen everywhere."""
