"""Small WAN models of each host, for the tests of everything above formats."""
