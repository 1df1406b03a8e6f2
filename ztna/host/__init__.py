"""What a host is given, as files: first configurations, units and their drop-ins, tmpfiles.d."""
