"""Who shares what, who averages, and when."""
