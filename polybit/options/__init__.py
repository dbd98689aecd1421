"""What each act can be told: a frozen, torch-free record each; keywords of the library, flags of the command line."""
