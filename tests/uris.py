"""URIs as people mistype them, and with credentials as other tools take them."""

WITH_CREDENTIALS = (
    "s3://AKIAME:SECRET@bucket/x",
    "s3://AKIAME:SE/SECRET@bucket/x",
    "s3://SECRET@bucket/x",
    "s3a://AKIAME:SE/SECRET@bucket/x",
    "s3n://AKIAME:SECRET@bucket/x",
    "s3:/AKIAME:SE/SECRET@bucket/x",
    "https://me:SECRET@host/x",
    "https://me:SE/SECRET@host/x?y=1",
    "https://host/x?X-Amz-Signature=SECRET",
    "https://host?token=SECRET",
    "s3://bucket/x?AWSAccessKeyId=AKIAME&Signature=SECRET",
    "s3://bucket/x?access_key=AKIAME&aws_secret_access_key=SECRET",
    "s3://bucket/x?scheme=http&secret_key=SECRET",
    "s3://bucket/x?session_token=SECRET",
    "s3://bucket/x?token=SECRET",
    "s3://bucket/x?password=SECRET",
    "s3://bucket/x?X-Amz-Security-Token=SECRET",
)
WITHOUT = ("s3://bucket/a@b", "s3://bucket/what?", "s3://bucket/x=1&y=2", "/data/a@b:c", "a:b@c")
"""Odd, but harmless."""
