# A web page and the connector that fronts it: the connector is a prestart sidecar task, so it runs before the
# service does and is stopped after it. Run it with
#
#   nomad job run -var certificates=/etc/ztna -var relay=10.0.0.1:4433 nomad/connector.nomad.hcl
#
# The directory holds connector.pem, connector.key (0600) and ca.pem, e.g. by
#   ztna ca issue connector --connector web-app --connector-id nomad ...

variable "certificates" {
  type        = string
  description = "Directory on the client with connector.pem, connector.key and ca.pem"
}

variable "relay" {
  type        = string
  description = "host:port of the relay"
}

variable "relay_name" {
  type        = string
  default     = "demo"
  description = "The relay's name, as in its certificate's relay.<name>.ztna"
}

variable "sidecar" {
  type        = string
  default     = "ztna-sidecar"
  description = "The console script: on PATH, or its full path"
}

variable "consul" {
  type        = string
  default     = "http://127.0.0.1:8500"
  description = "Consul's HTTP address"
}

variable "login_method" {
  type        = string
  default     = ""
  description = "Consul's auth method for Nomad's workload identities (docs/consul.md); empty: no token"
}

variable "virtual_port" {
  type        = number
  default     = 8080
  description = "The port that agents give local programs"
}

job "web-app" {
  type = "service"

  group "web" {
    network {
      port "http" {}
      port "link" {}
      port "admin" {}
    }

    # The application: any program that listens on the port Nomad gives it.
    task "web" {
      driver = "raw_exec"

      config {
        command = "python3"
        args    = ["-m", "http.server", "${NOMAD_PORT_http}", "--bind", "127.0.0.1"]
      }

      resources {
        cpu    = 50
        memory = 64
      }
    }

    task "connector" {
      driver = "raw_exec"

      lifecycle {
        hook    = "prestart"
        sidecar = true
      }

      # What the connector logs in to Consul with, when login_method is set.
      identity {
        name = "consul"
        aud  = ["consul.io"]
        file = true
      }

      # Sidecars stop last; the drain (25 s by default) fits into Nomad's max_kill_timeout of 30 s.
      kill_timeout = "30s"
      kill_signal  = "SIGTERM"

      config {
        command = var.sidecar
        args    = ["connector", "--config", "${NOMAD_TASK_DIR}/connector.yaml"]
      }

      template {
        destination = "local/connector.yaml"
        data        = <<-YAML
          consul:
            address: ${var.consul}
            %{~if var.login_method != ""~}

            login:
              method: ${var.login_method}
              jwt_file: {{ env "NOMAD_SECRETS_DIR" }}/nomad_consul.jwt
            %{~endif~}

          connector:
            # One connector id an allocation: allocations can run twice during a disconnect.
            id: nomad--{{ env "NOMAD_SHORT_ALLOC_ID" }}
            tls:
              certificate: ${var.certificates}/connector.pem
              key: ${var.certificates}/connector.key
              ca: ${var.certificates}/ca.pem
            relays:
              - address: ${var.relay}
                name: ${var.relay_name}
            routes:
              - service: web-app
                backend: 127.0.0.1:{{ env "NOMAD_PORT_http" }}
                port: ${var.virtual_port}
                protocol: tcp
                checks:
                  - kind: http
                    path: /
                    interval_s: 1
                    timeout_s: 1
            link: {{ env "NOMAD_ADDR_link" }}
            link_advertise: {{ env "NOMAD_ADDR_link" }}
            admin: 127.0.0.1:{{ env "NOMAD_PORT_admin" }}
        YAML
      }

      resources {
        cpu    = 100
        memory = 128
      }
    }
  }
}
