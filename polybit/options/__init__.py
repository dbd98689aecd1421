"""What each act can be told: one frozen record per act, torch-free; keywords of the library, flags of the command line."""
