"""The model of any rank of a job, built and run once without memory."""
