"""One file per claim: measured side by side with a peer, equality asserted first."""
