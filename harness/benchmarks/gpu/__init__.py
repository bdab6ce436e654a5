"""Measurements on a GPU machine, one without a network included: the kit it travels in, the evidence, the roofline."""
