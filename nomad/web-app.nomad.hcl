# An application and the connector that fronts it: the connector is a prestart sidecar task, so it runs before the
# application does and is stopped after it. Its certificate lies in a Nomad variable that only the connector's task may read:
#
#   ztna ca issue connector --connector web-app --connector-id nomad
#   nomad var put nomad/jobs/web-app/web/connector certificate=@connector.pem key=@connector.key ca=@ztna-ca/ca.pem
#   nomad job run -var relay=10.0.0.1:4433 nomad/web-app.nomad.hcl
#
# How an allocation is stopped, so that an update or a drain fails no request (the test is tests/e2e/test_nomad_jobs.py):
#
#   1. Nomad takes its service out of Consul. Within three seconds the connector notices, and withdraws from Consul and
#      the relays: new flows go to other allocations, running ones stay.
#   2. After shutdown_delay the application gets SIGTERM. Flows that run may go on until it ends, at most
#      app_kill_timeout; the connector cuts them 25 s (its drain_s) after it withdrew.
#   3. The connector gets SIGTERM, drains what is left and ends.

variable "driver" {
  type        = string
  default     = "raw_exec"
  description = "raw_exec, exec or docker"
}

variable "image" {
  type        = string
  default     = "ztna-mesh:0.1.0"
  description = "With docker: the connector's image"
}

variable "image_uid" {
  type        = number
  default     = 65532
  description = "With docker: the user and group of that image, to whom the certificate's key is given"
}

variable "command" {
  type        = string
  default     = "ztna-sidecar"
  description = "The console script: on PATH, or its full path"
}

variable "app_image" {
  type        = string
  default     = "python:3.11-slim-bookworm"
  description = "With docker: the application's image"
}

variable "app_command" {
  type        = string
  default     = "python3"
  description = "The application: any program that listens on the port Nomad gives it"
}

variable "app_args" {
  type        = list(string)
  default     = ["-m", "http.server", "$${NOMAD_PORT_http}", "--bind", "127.0.0.1"]
  description = "Its arguments"
}

variable "app_kill_timeout" {
  type        = string
  default     = "15s"
  description = "How long it may go on after SIGTERM, for flows that run"
}

variable "release" {
  type        = string
  default     = "1"
  description = "Another value is an update: every allocation is replaced"
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

variable "count" {
  type        = number
  default     = 1
  description = "How many allocations; a node's drain fails no request from two on"
}

variable "virtual_port" {
  type        = number
  default     = 8080
  description = "The port at its virtual address"
}

variable "connector_id" {
  type        = string
  default     = "nomad"
  description = "The connector's name, as in its certificate's id.<name>.ztna; each allocation adds an instance to it"
}

variable "relay" {
  type        = string
  description = "host:port of the relay"
}

variable "relay_name" {
  type        = string
  default     = "edge-1"
  description = "The relay's name, as in its certificate's relay.<name>.ztna"
}

variable "consul" {
  type        = string
  default     = "http://127.0.0.1:8500"
  description = "The HTTP address of the Consul agent on the same host"
}

variable "login_method" {
  type        = string
  default     = ""
  description = "Consul's auth method for Nomad's workload identities (docs/nomad.md); empty: no token"
}

variable "domain" {
  type        = string
  default     = "ztna.local"
  description = "The zone of the services' names"
}

# Who the task runs as, and so owns the key: the image's user, `nobody` with exec, else whoever the client runs as.
locals {
  key_owner = var.driver == "docker" ? var.image_uid : var.driver == "exec" ? 65534 : -1
}

job "web-app" {
  type        = "service"
  datacenters = var.datacenters

  dynamic "constraint" {
    for_each = var.node_class == "" ? [] : [var.node_class]

    content {
      attribute = "$${node.class}"
      value     = constraint.value
    }
  }

  # The canary makes this hold for a single allocation, too: the new one serves before the old one is stopped.
  # Relays hear of a new instance within min_healthy_time.
  update {
    max_parallel     = 1
    canary           = 1
    auto_promote     = true
    auto_revert      = true
    health_check     = "checks"
    min_healthy_time = "10s"
    healthy_deadline = "2m"
  }

  group "web" {
    count          = var.count
    shutdown_delay = "10s"

    # A node's drain stops an allocation as it places another one: others have to serve meanwhile.
    migrate {
      max_parallel     = 1
      health_check     = "checks"
      min_healthy_time = "10s"
    }

    network {
      port "http" {}
      port "link" {}
      port "admin" {}
    }

    # Only the connector beside it has to reach the application, so it listens on loopback. With this service Nomad tells
    # the connector where it is, whether it is well, and when it leaves; no other connector fronts it.
    service {
      name     = "web-app"
      provider = "consul"
      port     = "http"
      address  = "127.0.0.1"
      tags     = ["ztna"]

      meta {
        ztna-ports      = "tcp:${var.virtual_port}"
        ztna-fronted-by = "${var.connector_id}--$${NOMAD_SHORT_ALLOC_ID}"
      }

      check {
        name     = "answers"
        type     = "http"
        path     = "/"
        interval = "2s"
        timeout  = "1s"
      }
    }

    # An allocation is healthy when its connector is connected and registered, too.
    service {
      name     = "web-app-connector"
      provider = "consul"
      port     = "admin"
      address  = "127.0.0.1"

      check {
        name     = "ready"
        type     = "http"
        path     = "/readyz"
        interval = "2s"
        timeout  = "1s"
      }
    }

    task "app" {
      driver       = var.driver
      kill_timeout = var.app_kill_timeout
      kill_signal  = "SIGTERM"

      env {
        RELEASE = var.release
      }

      dynamic "config" {
        for_each = var.driver == "docker" ? [] : [var.app_command]

        content {
          command = config.value
          args    = var.app_args
        }
      }

      dynamic "config" {
        for_each = var.driver == "docker" ? [var.app_command] : []

        content {
          image        = var.app_image
          command      = config.value
          args         = var.app_args
          network_mode = "host"
        }
      }

      resources {
        cpu    = 50
        memory = 64
      }
    }

    task "connector" {
      driver = var.driver

      lifecycle {
        hook    = "prestart"
        sidecar = true
      }

      # Above the drain (25 s by default) and a logout (3 s). A client cuts it to its max_kill_timeout, which is 30 s unless it says more.
      kill_timeout = "30s"
      kill_signal  = "SIGTERM"

      # Where the image's health check asks; others have no use for it.
      env {
        READY_AT = "127.0.0.1:${NOMAD_PORT_admin}"
      }

      dynamic "config" {
        for_each = var.driver == "docker" ? [] : [var.command]

        content {
          command = config.value
          args    = ["connector", "--config", "${NOMAD_TASK_DIR}/connector.yaml"]
        }
      }

      dynamic "config" {
        for_each = var.driver == "docker" ? [var.command] : []

        content {
          image        = var.image
          command      = config.value
          args         = ["connector", "--config", "${NOMAD_TASK_DIR}/connector.yaml"]
          network_mode = "host"

          # No capability, and nothing of the image can be written to.
          cap_drop        = ["all"]
          security_opt    = ["no-new-privileges"]
          readonly_rootfs = true

          mount {
            type   = "tmpfs"
            target = "/run"
          }

          mount {
            type   = "tmpfs"
            target = "/tmp"
          }
        }
      }

      # What it logs in to Consul with, when login_method is set.
      identity {
        name = "consul"
        aud  = ["consul.io"]
        ttl  = "1h"
        file = true
      }

      template {
        destination = "local/connector.yaml"
        data        = <<-YAML
          domain: ${var.domain}
          consul:
            address: ${var.consul}
            %{~if var.login_method != ""~}

            login:
              method: ${var.login_method}
              jwt_file: {{ env "NOMAD_SECRETS_DIR" }}/nomad_consul.jwt
            %{~endif~}

          connector:
            # One connector id an allocation: allocations can run twice during a disconnect.
            id: ${var.connector_id}--{{ env "NOMAD_SHORT_ALLOC_ID" }}
            tls:
              certificate: {{ env "NOMAD_SECRETS_DIR" }}/connector.pem
              key: {{ env "NOMAD_SECRETS_DIR" }}/connector.key
              ca: {{ env "NOMAD_SECRETS_DIR" }}/ca.pem
            relays:
              - address: ${var.relay}
                name: ${var.relay_name}
            consul_services: true
            link: {{ env "NOMAD_ADDR_link" }}
            link_advertise: {{ env "NOMAD_ADDR_link" }}
            admin: 127.0.0.1:{{ env "NOMAD_PORT_admin" }}
        YAML
      }

      # A new certificate is taken up as its file changes, and no flow ends: nothing to restart or signal.
      template {
        destination = "secrets/connector.pem"
        change_mode = "noop"
        data        = "{{ with nomadVar \"nomad/jobs/web-app/web/connector\" }}{{ .certificate }}{{ end }}"
      }

      template {
        destination = "secrets/connector.key"
        change_mode = "noop"
        perms       = "0600"
        uid         = local.key_owner
        gid         = local.key_owner
        data        = "{{ with nomadVar \"nomad/jobs/web-app/web/connector\" }}{{ .key }}{{ end }}"
      }

      template {
        destination = "secrets/ca.pem"
        change_mode = "noop"
        data        = "{{ with nomadVar \"nomad/jobs/web-app/web/connector\" }}{{ .ca }}{{ end }}"
      }

      resources {
        cpu    = 100
        memory = 128
      }
    }
  }
}
