"""What more ranks will bring: costs of collectives, networks, and predictions of step time and efficiency."""
