# Builds the zips of scripts/package where it cannot run, such as on a Mac:
#
#   docker build --platform linux/amd64 -f scripts/package.Dockerfile --output target/lambda .
#
# The platform is that of the ONNX Runtime library which goes into the zip.
FROM rust:1.95.0-bookworm AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /lesion
# What the build reads, and nothing of target/ or .cache/.
COPY Cargo.toml Cargo.lock NOTICE LICENSE-APACHE ./
COPY scripts scripts
COPY model model
COPY shared shared
COPY functions functions
COPY local local
COPY cli cli
COPY tests tests
# --with-model puts the bundle into inference's zip, as scripts/deploy does.
ARG OPTIONS=
RUN scripts/package $OPTIONS

FROM scratch
COPY --from=build /lesion/target/lambda/*.zip /
