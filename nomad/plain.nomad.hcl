# A service that knows nothing of the mesh but the tag `ztna`: it is leased an address, and the connector of its host
# (connector.nomad.hcl) fronts it.
#
#   nomad job run nomad/plain.nomad.hcl

variable "driver" {
  type        = string
  default     = "raw_exec"
  description = "raw_exec, exec or docker"
}

variable "image" {
  type        = string
  default     = "python:3.11-slim-bookworm"
  description = "With docker: the image that has the command"
}

variable "command" {
  type        = string
  default     = "python3"
  description = "The application: any program that listens on the port Nomad gives it"
}

variable "args" {
  type        = list(string)
  default     = ["-m", "http.server", "$${NOMAD_PORT_http}", "--bind", "127.0.0.1"]
  description = "Its arguments"
}

variable "datacenters" {
  type        = list(string)
  default     = ["*"]
  description = "The datacenters it may run in"
}

variable "node_class" {
  type        = string
  default     = ""
  description = "The class of the clients it may run on; empty: any"
}

variable "virtual_port" {
  type        = number
  default     = 80
  description = "The port at its virtual address"
}

job "plain-web" {
  type        = "service"
  datacenters = var.datacenters

  dynamic "constraint" {
    for_each = var.node_class == "" ? [] : [var.node_class]

    content {
      attribute = "$${node.class}"
      value     = constraint.value
    }
  }

  group "web" {
    # Nomad deregisters it, the connector leads new flows elsewhere within three seconds, then the program is stopped.
    shutdown_delay = "10s"

    network {
      port "http" {}
    }

    # Only the connector of this host has to reach it, so it listens on loopback.
    service {
      name     = "plain-web"
      provider = "consul"
      port     = "http"
      address  = "127.0.0.1"
      tags     = ["ztna"]

      meta {
        ztna-ports = "tcp:${var.virtual_port}"
      }

      check {
        name     = "answers"
        type     = "http"
        path     = "/"
        interval = "2s"
        timeout  = "1s"
      }
    }

    task "web" {
      driver      = var.driver
      kill_signal = "SIGTERM"

      dynamic "config" {
        for_each = var.driver == "docker" ? [] : [var.command]

        content {
          command = config.value
          args    = var.args
        }
      }

      dynamic "config" {
        for_each = var.driver == "docker" ? [var.command] : []

        content {
          image        = var.image
          command      = config.value
          args         = var.args
          network_mode = "host"
        }
      }

      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
