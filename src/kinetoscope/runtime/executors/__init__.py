"""Where requests are carried out: in this process, in others of this machine, under torchrun, or on a Ray cluster."""
