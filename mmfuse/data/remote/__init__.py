"""Remote shards: addresses, requests that outlive faults, and a node's bounded cache with the process that fills it."""
