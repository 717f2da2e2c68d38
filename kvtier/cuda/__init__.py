"""The GPU as kvtier uses it: streams, events, copies, memory. Nothing else in kvtier calls torch.cuda or the driver for these."""
